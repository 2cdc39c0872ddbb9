"""How near a layout's pictures are to one device's: settings to try, likeness, and a page to look at."""
