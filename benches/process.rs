//! A child process that is measured: what it has cost in CPU time and memory, read from `/proc` of Linux.

use std::{
    fs, io,
    process::{Child, ChildStdin, ChildStdout, Command},
    time::Duration,
};

/// A child that ends with this value.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    /// Starts a command. Programs that replace themselves (`ip netns exec`, `setpriv`) keep the process that is measured.
    ///
    /// # Errors
    /// If the program can't be started.
    pub fn start(command: &mut Command) -> io::Result<Self> {
        command.spawn().map(Self)
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Its standard input and output, once, where the command has piped them.
    pub fn pipes(&mut self) -> (Option<ChildStdin>, Option<ChildStdout>) {
        (self.0.stdin.take(), self.0.stdout.take())
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// As [`Child::wait`].
    pub fn wait(&mut self) -> io::Result<std::process::ExitStatus> {
        self.0.wait()
    }

    /// The exit status, if it has ended.
    ///
    /// # Errors
    /// As [`Child::try_wait`].
    pub fn ended(&mut self) -> io::Result<Option<std::process::ExitStatus>> {
        self.0.try_wait()
    }

    /// CPU time that its present threads have had, in user and kernel mode. Threads that have ended are not counted: the
    /// measured programs keep theirs.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn cpu(&self) -> io::Result<Duration> {
        let mut sum = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.id()))? {
            let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
            sum += first_number(&text).ok_or_else(|| invalid("schedstat"))?;
        }
        Ok(Duration::from_nanos(sum))
    }

    /// Proportional set size, KiB: its own pages, and its share of those it shares.
    ///
    /// # Errors
    /// If the process is gone, or belongs to someone else.
    pub fn pss(&self) -> io::Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.id()))?;
        let line = text.lines().find_map(|l| l.strip_prefix("Pss:")).ok_or_else(|| invalid("smaps_rollup"))?;
        first_number(line).ok_or_else(|| invalid("smaps_rollup"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn first_number(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("/proc: unexpected text in {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_child_costs_cpu_time_and_memory() {
        let child = Process::start(Command::new("sh").args(["-c", "while :; do :; done"])).unwrap();
        while child.cpu().unwrap() < Duration::from_millis(2) {
            std::thread::yield_now();
        }
        assert!(child.pss().unwrap() > 0);
    }
}
