"""What `vidworld inspect` looks at: episodes that are read, detectors of faults, figures and the page."""
