"""Starting a training on many processes and hosts: `vidworld launch`."""
