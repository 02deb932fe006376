"use strict";
// Moves through the videos of a report. All pictures are in the page, as JSON; nothing is ever fetched.
const DATA = JSON.parse(document.getElementById("data").textContent);
const PACE = matchMedia("(prefers-reduced-motion: reduce)").matches ? 1000 : 125; // milliseconds a frame

function show(section, index) {
  const video = DATA.videos[Number(section.dataset.video)];
  const slider = section.querySelector("input[type=range]");
  const words = `frame ${video.frames[index] + 1} of ${video.length}`;
  slider.value = index;
  if (!section.dataset.timer) slider.setAttribute("aria-valuetext", words); // while it plays, a reader would never end
  section.querySelector("output").textContent = words;
  section.querySelectorAll(".side").forEach((figure, number) => {
    const side = video.sides[number];
    const visible = side.visible[index];
    const tracks = visible.map((track) => side.legend[track][0]).join(", ") || "no track";
    const [frame, overlay] = figure.querySelectorAll("img");
    frame.src = video.pictures[index];
    frame.alt = `${side.title}, ${words} of ${video.name}: ${tracks}`;
    overlay.src = side.overlays[index];
    figure.querySelectorAll(".legend li").forEach((item, track) => {
      item.classList.toggle("absent", !visible.includes(track));
    });
  });
}

function play(section, button) {
  const slider = section.querySelector("input[type=range]");
  const running = Number(section.dataset.timer || 0);
  clearInterval(running);
  delete section.dataset.timer;
  section.querySelector("output").setAttribute("aria-live", running ? "polite" : "off"); // a pause is said
  if (running) {
    show(section, Number(slider.value));
  } else {
    section.dataset.timer = setInterval(() => {
      show(section, (Number(slider.value) + 1) % (Number(slider.max) + 1));
    }, PACE);
  }
  button.querySelector("span").textContent = running ? "Play" : "Pause";
}

document.querySelectorAll("section.video").forEach((section) => {
  const slider = section.querySelector("input[type=range]");
  slider.addEventListener("input", () => show(section, Number(slider.value)));
  section.querySelector("button").addEventListener("click", (event) => play(section, event.currentTarget));
  show(section, Math.floor(Number(slider.max) / 2));
});

document.querySelectorAll("#show input").forEach((box) => {
  box.addEventListener("change", () => {
    if (box.name === "masks") {
      document.querySelectorAll("img.overlay").forEach((image) => { image.hidden = !box.checked; });
    } else {
      document.querySelectorAll(`.side[data-side="${box.value}"]`).forEach((side) => { side.hidden = !box.checked; });
    }
  });
});

// On paper nothing can be opened: all tables are, and are closed again afterwards.
let opened = [];
addEventListener("beforeprint", () => {
  opened = Array.from(document.querySelectorAll("details:not([open])"));
  opened.forEach((details) => { details.open = true; });
});
addEventListener("afterprint", () => opened.forEach((details) => { details.open = false; }));
