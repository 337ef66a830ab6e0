//! linkerd-stack
