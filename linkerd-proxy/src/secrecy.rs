//! Private keys live in this process's memory, and so must not reach a core file, or a debugger of the same user.

/// Makes the process undumpable (prctl(2), `PR_SET_DUMPABLE`): the kernel writes no core of it, to a file or to a
/// `core_pattern` program, and only root may look into it. What a program is asked to run later is not affected.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
pub(crate) fn keep() {
    // SAFETY: the call takes two integers and touches no memory of ours.
    let result = unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0 as libc::c_ulong) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "core dumps can't be switched off; a core file would hold the private key");
    }
}

/// Only Linux can be asked.
#[cfg(not(target_os = "linux"))]
pub(crate) fn keep() {}
