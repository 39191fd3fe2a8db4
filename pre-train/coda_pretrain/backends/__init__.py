"""What differs between plain torch devices and torch_xla, behind one seam (``base.Backend``)."""
