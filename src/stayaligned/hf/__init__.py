"""The host libraries: the only package that imports transformers, peft, accelerate and trl."""
