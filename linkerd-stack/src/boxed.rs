//! The seam between stages: a service whose type is forgotten, shared by cloning one pointer.
//!
//! It is always ready: backpressure is waited for inside the future of the call, so that a clone costs a reference
//! count and no caller can hold a slot that it does not use.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tower::{Service, ServiceExt};

/// The future of a [`BoxService`]. Dropping it cancels the call.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A service of any type that answers `Req` with `Rsp` or `E`. Cloning is cheap and allocates nothing.
pub struct BoxService<Req, Rsp, E>(Arc<dyn Call<Req, Rsp, E>>);

trait Call<Req, Rsp, E>: Send + Sync {
    fn call(&self, req: Req) -> BoxFuture<Result<Rsp, E>>;
}

struct Cloning<S>(S);
struct Calling<F>(F);

impl<Req, Rsp, E> BoxService<Req, Rsp, E> {
    /// Forgets the type of a service. Each call clones it, waits until the clone is ready, and spends it.
    pub fn new<S>(inner: S) -> Self
    where
        Req: Send + 'static,
        S: Service<Req, Response = Rsp, Error = E> + Clone + Send + Sync + 'static,
        S::Future: Send,
    {
        Self(Arc::new(Cloning(inner)))
    }

    /// Makes a service of an asynchronous function.
    pub fn from_fn<F, Fut>(f: F) -> Self
    where
        F: Fn(Req) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Rsp, E>> + Send + 'static,
    {
        Self(Arc::new(Calling(f)))
    }

    /// Calls without the `&mut` that `tower::Service` asks for.
    pub fn send(&self, req: Req) -> BoxFuture<Result<Rsp, E>> {
        self.0.call(req)
    }
}

impl<Req, Rsp, E, S> Call<Req, Rsp, E> for Cloning<S>
where
    Req: Send + 'static,
    S: Service<Req, Response = Rsp, Error = E> + Clone + Send + Sync + 'static,
    S::Future: Send,
{
    fn call(&self, req: Req) -> BoxFuture<Result<Rsp, E>> {
        Box::pin(self.0.clone().oneshot(req))
    }
}

impl<Req, Rsp, E, F, Fut> Call<Req, Rsp, E> for Calling<F>
where
    F: Fn(Req) -> Fut + Send + Sync,
    Fut: Future<Output = Result<Rsp, E>> + Send + 'static,
{
    fn call(&self, req: Req) -> BoxFuture<Result<Rsp, E>> {
        Box::pin((self.0)(req))
    }
}

impl<Req, Rsp, E> Service<Req> for BoxService<Req, Rsp, E> {
    type Response = Rsp;
    type Error = E;
    type Future = BoxFuture<Result<Rsp, E>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), E>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, req: Req) -> Self::Future {
        self.0.call(req)
    }
}

impl<Req, Rsp, E> Clone for BoxService<Req, Rsp, E> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<Req, Rsp, E> fmt::Debug for BoxService<Req, Rsp, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BoxService")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    /// Doubles, but is ready only on its second poll.
    #[derive(Clone)]
    struct Late(bool);

    impl Service<u32> for Late {
        type Response = u32;
        type Error = Infallible;
        type Future = std::future::Ready<Result<u32, Infallible>>;

        fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            if std::mem::replace(&mut self.0, true) {
                return Poll::Ready(Ok(()));
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        }

        fn call(&mut self, req: u32) -> Self::Future {
            assert!(self.0, "called before it was ready");
            std::future::ready(Ok(req * 2))
        }
    }

    #[tokio::test]
    async fn waits_for_the_inner_service_inside_the_call() {
        let svc = BoxService::new(Late(false));
        assert_eq!(svc.clone().oneshot(4).await, Ok(8));
        assert_eq!(svc.send(5).await, Ok(10));
    }

    #[tokio::test]
    async fn functions_are_services() {
        let svc: BoxService<u32, u32, String> =
            BoxService::from_fn(|n| async move { if n == 0 { Err("zero".to_string()) } else { Ok(n) } });
        assert_eq!(svc.send(1).await, Ok(1));
        assert_eq!(svc.send(0).await, Err("zero".to_string()));
    }
}
