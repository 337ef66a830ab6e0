//! Measurements live here.
