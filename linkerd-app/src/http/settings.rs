//! The settings of HTTP servers and clients, from the words of the configuration and of discovery to those of the stack.

use crate::{
    config::HttpServer,
    policy::{
        client::Backoff,
        endpoint::{Http2Params, Http2Windows},
    },
};
use linkerd_stack::{
    backoff,
    http::{
        ServerConfig,
        client::{Http2Config, KeepAlive},
    },
};

/// A server's.
pub fn server(cfg: &HttpServer) -> ServerConfig {
    ServerConfig {
        stream_window: cfg.stream_window,
        connection_window: cfg.connection_window,
        adaptive_window: cfg.adaptive_window,
        keep_alive: cfg.keep_alive,
        max_concurrent_streams: cfg.max_concurrent_streams,
        max_frame_size: cfg.max_frame_size,
        max_header_size: cfg.max_header_size,
        max_header_setting: cfg.max_header_setting,
        max_pending_accept_reset_streams: cfg.max_pending_accept_reset_streams,
        max_send_buf_size: cfg.max_send_buf_size,
    }
}

/// An HTTP/2 client's: each as `own` says, else as `fallback` does, else the stack's default.
pub fn http2_client(own: &Http2Params, fallback: &Http2Params) -> Http2Config {
    let size = |n: Option<u32>| n.and_then(|n| usize::try_from(n).ok());
    let mut config = Http2Config {
        keep_alive: own.keep_alive.or(fallback.keep_alive).map(|k| KeepAlive {
            interval: k.interval,
            timeout: k.timeout,
            while_idle: k.while_idle,
        }),
        max_frame_size: own.max_frame_size.or(fallback.max_frame_size),
        max_send_buf_size: size(own.max_send_buf_size.or(fallback.max_send_buf_size)),
        max_concurrent_reset_streams: size(own.max_concurrent_reset_streams.or(fallback.max_concurrent_reset_streams)),
        ..Http2Config::default()
    };
    match own.windows.or(fallback.windows) {
        None => {}
        Some(Http2Windows::Adaptive) => config.adaptive_window = true,
        Some(Http2Windows::Fixed { stream, connection }) => {
            (config.stream_window, config.connection_window) = (stream, connection);
        }
    }
    config
}

/// A client's waits between attempts.
pub fn backoff(backoff: &Backoff) -> backoff::Backoff {
    let Backoff { min, max, jitter } = *backoff;
    backoff::Backoff { min, max, jitter }
}
