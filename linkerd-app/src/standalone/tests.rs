//! Whole-source tests.
