"""What training costs: backward FLOPs and bytes kept, by layer and by model, and as the paper counts."""
