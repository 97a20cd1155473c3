"""Around the chains: feature scaling, folding of norms, dropout as an ensemble."""
