"""What every program does around its work: flags, settings, compiled programs kept, old commands told."""
