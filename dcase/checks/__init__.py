"""What `dcase.doctor` looks at: the `machine`, the `data`, its clips' `lengths`; and how it tells it (`findings`)."""
