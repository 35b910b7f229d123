"""A model on a web page that needs no server: it runs on the visitor's own device."""
