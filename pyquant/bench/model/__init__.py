"""Time of a whole model: one prefill and a token at a time, with the linear layers of one variant after the other."""
