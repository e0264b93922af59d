"""`python -m interp_rlhf` is `interp-rlhf`."""

from .cli import main

raise SystemExit(main())
