//! Moving bytes between two sockets inside the kernel (Linux `splice(2)`), through pipes that are taken from a pool
//! only while bytes are on their way. The only file of this crate with `unsafe`.
#![allow(unsafe_code)]

use std::{
    cell::RefCell,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// Empty pipes kept per thread. A pipe costs two descriptors; more connections than this rarely have bytes on their
/// way in one thread at once.
const MAX_IDLE_PIPES: usize = 64;

/// Most bytes moved by one call: the size of a pipe that was not enlarged (pipe(7)).
pub(crate) const MAX_SPLICE: usize = 64 * 1024;

thread_local! {
    static IDLE: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// A pipe, and how many bytes are in it.
#[derive(Debug)]
pub(crate) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
}

impl Pipe {
    /// An empty pipe, from the pool if it has one.
    pub(crate) fn take() -> io::Result<Self> {
        if let Ok(Some(pipe)) = IDLE.try_with(|idle| idle.borrow_mut().pop()) {
            return Ok(pipe);
        }
        let mut fds = [0; 2];
        // SAFETY: `fds` is room for the two descriptors that the call writes.
        if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so both are open descriptors that nothing else owns.
        let (read, write) = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
        Ok(Self { read, write, held: 0 })
    }

    /// Gives the pipe back to the pool. One with bytes in it is closed.
    pub(crate) fn give_back(self) {
        if self.held == 0 {
            // A thread that is ending has no pool any more; then the pipe is closed.
            let _ = IDLE.try_with(|idle| {
                let mut idle = idle.borrow_mut();
                if idle.len() < MAX_IDLE_PIPES {
                    idle.push(self);
                }
            });
        }
    }

    /// Bytes that are on their way.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Moves what the socket has into the empty pipe; 0 means that the socket's peer has finished.
    pub(crate) fn fill(&mut self, from: BorrowedFd<'_>) -> io::Result<usize> {
        let moved = splice(from.as_raw_fd(), self.write.as_raw_fd(), MAX_SPLICE)?;
        self.held += moved;
        Ok(moved)
    }

    /// Moves what the pipe holds into the socket, as far as it takes it.
    pub(crate) fn drain(&mut self, to: BorrowedFd<'_>) -> io::Result<usize> {
        let moved = splice(self.read.as_raw_fd(), to.as_raw_fd(), self.held)?;
        self.held -= moved.min(self.held);
        Ok(moved)
    }
}

fn splice(from: i32, to: i32, len: usize) -> io::Result<usize> {
    let null = std::ptr::null_mut();
    let flags = libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE;
    // SAFETY: the call reads and writes no memory of ours: both offsets are null, as pipes and sockets demand. Both
    // descriptors are open, for their owners are borrowed by the callers.
    let moved = unsafe { libc::splice(from, null, to, null, len, flags) };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}
