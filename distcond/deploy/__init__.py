"""Trained models outside of training: exported, loaded with torch and safetensors alone, asked, and explained."""
