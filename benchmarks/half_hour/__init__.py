"""What half an hour on one GPU can prove, in pieces: what to run, running it, and the page that is made of it."""
