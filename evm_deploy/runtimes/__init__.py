"""One runtime per engine, all behind `base.Runtime`."""
