"""What `dcase.doctor` looks at: the `machine`, the `data`; and how it says what it found (`findings`)."""
