//! What a codec reports, as one closed enum: the only place where errors of hyper and h2 are taken apart.

use crate::http::body::{BodyError, source};
use std::{error::Error as StdError, fmt, io, sync::Arc};

/// Why there is no response.
#[derive(Clone, Debug)]
pub enum SendError<E> {
    /// No connection.
    Connect(E),
    /// Reading or writing the connection failed.
    Io {
        /// Number of the system's error, if it was one.
        errno: Option<i32>,
        /// Text.
        message: Arc<str>,
    },
    /// The HTTP/2 stream was reset, by the peer, or by us because of what the peer sent.
    Reset(h2::Reason),
    /// The HTTP/2 connection ended under the stream; whether the request was processed is not known.
    Connection(Arc<str>),
    /// The connection closed before the head of the response was complete.
    IncompleteResponse,
    /// The peer provably did not process the request: refused, above a GOAWAY's last stream, or never sent. It was
    /// sent again already where that was possible.
    Unprocessed(Arc<str>),
    /// The content of the request ended early.
    RequestBody(BodyError),
    /// The response, or the request, can't be.
    Invalid(Arc<str>),
}

impl<E> SendError<E> {
    /// Whether the peer provably did not process the request.
    pub fn is_unprocessed(&self) -> bool {
        matches!(self, Self::Connect(_) | Self::Unprocessed(_))
    }

    /// The reason of an HTTP/2 reset, if that is what it was.
    pub fn reset(&self) -> Option<h2::Reason> {
        match self {
            Self::Reset(reason) => Some(*reason),
            Self::RequestBody(error) => error.reset(),
            Self::Connect(_)
            | Self::Io { .. }
            | Self::Connection(_)
            | Self::IncompleteResponse
            | Self::Unprocessed(_)
            | Self::Invalid(_) => None,
        }
    }

    fn io(error: &io::Error) -> Self {
        Self::Io { errno: error.raw_os_error(), message: error.to_string().into() }
    }
}

impl<E: fmt::Display> fmt::Display for SendError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(error) => error.fmt(f),
            Self::Io { message, .. } => f.write_str(message),
            Self::Reset(reason) => write!(f, "stream error received: {reason}"),
            Self::Connection(message) => write!(f, "HTTP/2 connection failed: {message}"),
            Self::IncompleteResponse => f.write_str("connection closed before a complete response"),
            Self::Unprocessed(message) => write!(f, "request was not processed: {message}"),
            Self::RequestBody(error) => write!(f, "request ended early: {error}"),
            Self::Invalid(message) => f.write_str(message),
        }
    }
}

impl<E: fmt::Debug + fmt::Display> StdError for SendError<E> {}

impl<E> From<hyper::Error> for SendError<E> {
    fn from(error: hyper::Error) -> Self {
        if let Some(error) = source::<BodyError>(&error) {
            return Self::RequestBody(error.clone());
        }
        if let Some(h2) = source::<h2::Error>(&error) {
            return from_h2(h2);
        }
        if let Some(io) = source::<io::Error>(&error) {
            return Self::io(io);
        }
        let text = || -> Arc<str> {
            match error.source() {
                Some(cause) => format!("{error}: {cause}").into(),
                None => error.to_string().into(),
            }
        };
        if error.is_incomplete_message() {
            Self::IncompleteResponse
        } else if error.is_canceled() || error.is_closed() {
            Self::Unprocessed(text())
        } else if error.is_timeout() {
            Self::Connection("keep-alive timed out".into())
        } else {
            Self::Invalid(text())
        }
    }
}

fn from_h2<E>(error: &h2::Error) -> SendError<E> {
    if let Some(io) = error.get_io() {
        return SendError::io(io);
    }
    match error.reason() {
        // RFC 9113 section 8.7: "the request has not been processed".
        Some(h2::Reason::REFUSED_STREAM) if error.is_reset() && error.is_remote() => {
            SendError::Unprocessed(error.to_string().into())
        }
        // Streams that a GOAWAY covers go on; those above its last stream get this, and were not processed (section
        // 6.8).
        Some(_) if error.is_go_away() && error.is_remote() => SendError::Unprocessed(error.to_string().into()),
        Some(reason) if error.is_reset() => SendError::Reset(reason),
        _ => SendError::Connection(error.to_string().into()),
    }
}
