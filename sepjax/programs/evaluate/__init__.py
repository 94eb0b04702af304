"""Jobs that score models, a file each: `sepjax evaluate windows|compare|stream|needle|recall|tasks`."""
