"""External helpers: detectors, captioners and image sources, all by one convention.

* A source is a callable, described by a protocol (`Detector`, `Captioner`, `ImageSource`); any function qualifies.
* `as_detector(value, backbone)` and its like make one of what a user gives: a callable stays as it is, a string is a
  hub id, a folder, or the name of the stand-in that needs no download ("saliency", "phrases", "playground").
* Methods call it through a function that checks the answer: `detect`, `describe`, `support_of`.
* Its `name` is what a saved model keeps of it.
"""
