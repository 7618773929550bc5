"""What the options of a run may be, each rule once: dataclasses and checks, in plain Python."""
