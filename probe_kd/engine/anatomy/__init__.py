"""A trace read as an encoder of stages and blocks, and a decoder, whatever the modules are called."""
