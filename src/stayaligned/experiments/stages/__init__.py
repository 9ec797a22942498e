"""The stages of a run, each a directory that is named by everything it depends on."""
