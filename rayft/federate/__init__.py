"""`rayft federate`: one adapter learnt from many clients' data, which stays with them."""
