"""The manual: what makes a site of docs/, runs the commands it shows, and checks that they exist. Run `make docs`."""
