"""Networks that SpeechBrain does not have: ResNet34 for speech, IResNet and MobileFaceNet."""
