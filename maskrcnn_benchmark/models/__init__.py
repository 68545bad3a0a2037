"""Mask R-CNN and Faster R-CNN. `build.build_model(cfg)` makes a detector from a configuration; every module takes
keyword arguments and can be built without one."""
