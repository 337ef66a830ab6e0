//! Making services for targets: at once, and without failing. Waiting and failing belong to the service made.

/// A factory from a target to a service.
pub trait NewService<T> {
    /// What is made.
    type Service;

    /// Makes the service of one target. It neither waits nor fails.
    fn new_service(&self, target: T) -> Self::Service;
}

impl<F, T, S> NewService<T> for F
where
    F: Fn(T) -> S,
{
    type Service = S;

    fn new_service(&self, target: T) -> S {
        self(target)
    }
}
