"""Methods of selection that train or try; nothing that they change is the user's."""
