"""Cases and how they are built. asv imports every module here: none may need pytest, nor torch before it builds."""
