"""The demo's world: moving shapes instead of YouTube-VIS, and a small Mask2Former instead of a COCO one."""
