"""Where help comes from: detectors, captioners, image sources. Each is a protocol with an offline stand-in."""
