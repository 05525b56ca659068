"""How a network is trained: transforms, optimizer, LightningModule, initial weights."""
