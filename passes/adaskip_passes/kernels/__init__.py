"""Operations of our own, and which matrix library runs them."""
