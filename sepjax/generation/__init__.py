"""The inside of `sepjax.generate`: the steps on the device, and on the host prompts, stop strings and the loop."""
