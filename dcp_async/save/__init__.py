"""One save: ranks agree on a plan, parts flow to the storage, one commit publishes them."""
