//! A sidecar uses a few megabytes, in many small pieces: in huge pages most of them would be empty.

/// Asks for no transparent huge pages (prctl(2), `PR_SET_THP_DISABLE`), also where the system gives them to everybody: one
/// that is touched once costs 2 MiB. The allocator asks for none itself (its feature `no_thp`). For the proxy only: what
/// `await` runs would inherit it.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
pub(crate) fn small_pages() {
    // SAFETY: the call takes integers and touches no memory of ours.
    let result = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1 as libc::c_ulong, 0, 0, 0) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "huge pages can't be switched off; the proxy may use more memory than it needs");
    }
}

/// Only Linux can be asked.
#[cfg(not(target_os = "linux"))]
pub(crate) fn small_pages() {}
