"""Parameter: penalties on the weights of the model beside a token loss."""
