"""What int8 costs and brings: layers and models beside their float originals, and the return of the worst to float."""
