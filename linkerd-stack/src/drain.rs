//! Ending gracefully: one signal, many watches. Whoever holds a watch is work in progress; the signal waits for all
//! of them to be dropped, and sets no limit of its own (the caller owns the grace period).

use tokio::sync::watch;

/// The side that ends things. Dropped without [`Signal::drain`], nothing is ever told to end.
#[derive(Debug)]
pub struct Signal(watch::Sender<bool>);

/// The side that is told. Each clone keeps the drain from completing until it is dropped.
#[derive(Clone, Debug)]
pub struct Watch(watch::Receiver<bool>);

/// Makes a signal and its first watch.
pub fn channel() -> (Signal, Watch) {
    let (tx, rx) = watch::channel(false);
    (Signal(tx), Watch(rx))
}

impl Signal {
    /// Tells every watch, and waits until all of them are gone. Dropping the future keeps the signal given, for
    /// watches that exist.
    pub async fn drain(self) {
        self.0.send_replace(true);
        self.0.closed().await;
    }

    /// Another watch.
    pub fn watch(&self) -> Watch {
        Watch(self.0.subscribe())
    }
}

impl Watch {
    /// Waits until the drain begins; forever if its signal was dropped unused. Dropping the future is harmless.
    pub async fn signaled(&self) {
        let mut rx = self.0.clone();
        if rx.wait_for(|draining| *draining).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether the drain has begun.
    pub fn is_signaled(&self) -> bool {
        *self.0.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn waits_for_every_watch() {
        let (signal, watch) = channel();
        let other = watch.clone();
        assert!(!watch.is_signaled());
        assert!(watch.signaled().now_or_never().is_none());
        let mut done = Box::pin(signal.drain());
        assert!(done.as_mut().now_or_never().is_none());
        assert!(watch.is_signaled());
        other.signaled().await;
        drop(watch);
        assert!(done.as_mut().now_or_never().is_none());
        drop(other);
        assert!(done.as_mut().now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_dropped_signal_ends_nothing() {
        let (signal, watch) = channel();
        drop(signal);
        assert!(watch.signaled().now_or_never().is_none());
        assert!(!watch.is_signaled());
    }

    #[tokio::test]
    async fn a_dropped_drain_stays_given() {
        let (signal, watch) = channel();
        assert!(signal.drain().now_or_never().is_none());
        watch.signaled().await;
    }
}
