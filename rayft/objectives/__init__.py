"""What is minimised. One file per objective; none of them knows of data, models' loading or Ray."""
