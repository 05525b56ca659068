"""How a network is trained: transforms, optimizer, LightningModule, weights to start from."""
