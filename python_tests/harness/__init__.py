"""What the tests run on: cases, backends without a GPU, tiny data. README.md says what is where."""
