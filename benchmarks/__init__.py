"""Models, contenders and the timing harness that measure pointfuse; not part of the installed package."""
