//! The key and the request for a certificate: read from the identity folder if a helper left them there, else made in
//! memory (contract.md section 4); and the token that goes with the request. Nothing is ever written.

use linkerd_tls::{Id, Invalid, Key, csr};
use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

/// The key, PKCS#8 DER.
const KEY: &str = "key.p8";
/// The request, PKCS#10 DER.
const CSR: &str = "csr.der";
/// Largest file that is read, bytes; both kinds are a few hundred.
const MAX_FILE: u64 = 64 * 1024;

/// Largest token that is read, bytes; a service-account token has about 1,500.
const MAX_TOKEN: u64 = 64 * 1024;

/// A key and a request for a certificate of it.
#[derive(Clone, Debug)]
pub struct Documents {
    /// The private key.
    pub key: Key,
    /// DER.
    pub csr: Vec<u8>,
}

/// Why there are no documents.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is there and can't be read.
    #[error("{path}: {source}; make it readable for the proxy's user, or remove key.p8 and csr.der and the proxy makes \
             its own", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// The files are no good.
    #[error("{path}: {source}; remove key.p8 and csr.der and the proxy makes its own", path = path.display())]
    Contents {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Invalid,
    },
    /// A key could not be made.
    #[error("a key for {id} could not be made: {source}")]
    Make {
        /// Own identity.
        id: Id,
        /// Why.
        source: Invalid,
    },
}

impl Documents {
    /// Reads `key.p8` and `csr.der` if both are in the folder; makes them in memory otherwise. A folder that is not
    /// there is no error, since nothing is needed from it.
    ///
    /// # Errors
    /// When files that are there are unusable, do not belong together or name another identity.
    pub fn load(dir: &Path, id: &Id) -> Result<Self, Error> {
        match (read(&dir.join(KEY))?, read(&dir.join(CSR))?) {
            (Some(key), Some(csr)) => {
                let key = Key::from_pkcs8(key);
                csr::check(&csr, &key, id).map_err(|source| Error::Contents { path: dir.join(CSR), source })?;
                Ok(Self { key, csr })
            }
            (None, None) => Self::make(id),
            (found, _) => {
                let (found, missing) = if found.is_some() { (KEY, CSR) } else { (CSR, KEY) };
                tracing::warn!(dir = %dir.display(), "{found} is there but {missing} is not; both are made in memory");
                Self::make(id)
            }
        }
    }

    /// A new key and its request, in memory.
    ///
    /// # Errors
    /// When the system has no randomness to give.
    pub fn make(id: &Id) -> Result<Self, Error> {
        let make = || {
            let key = csr::generate_key()?;
            let csr = csr::csr_der(&key, id)?;
            Ok(Self { key, csr })
        };
        make().map_err(|source| Error::Make { id: id.clone(), source })
    }
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
#[error("token {path} {why}", path = path.display())]
pub struct TokenError {
    /// The file.
    pub path: PathBuf,
    why: String,
}

/// The service-account token, byte for byte. Blocks on a small file.
///
/// # Errors
/// When it can't be read, is empty, or is too large to be one.
pub fn token(path: &Path) -> Result<Vec<u8>, TokenError> {
    let error = |why: String| TokenError { path: path.to_owned(), why };
    let mut token = Vec::new();
    let file = fs::File::open(path).map_err(|e| error(format!("can't be read: {e}")))?;
    file.take(MAX_TOKEN + 1).read_to_end(&mut token).map_err(|e| error(format!("can't be read: {e}")))?;
    if token.is_empty() {
        return Err(error("is empty".into()));
    }
    if token.len() as u64 > MAX_TOKEN {
        return Err(error(format!("is larger than {MAX_TOKEN} bytes")));
    }
    Ok(token)
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let error = |source| Error::Read { path: path.to_owned(), source };
    let len = match fs::metadata(path) {
        Ok(meta) => meta.len(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(error(e)),
    };
    if len == 0 || len > MAX_FILE {
        return Err(error(io::Error::other(format!("{len} bytes long, expected 1 to {MAX_FILE}"))));
    }
    fs::read(path).map(Some).map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::folder::tests::Dir;

    fn id() -> Id {
        "web.shop.serviceaccount.identity.linkerd.cluster.local".parse().unwrap()
    }

    #[track_caller]
    fn refused(dir: &Dir, words: &str) {
        let error = Documents::load(&dir.0, &id()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn files_of_a_helper_are_used() {
        let (dir, made) = (Dir::new("documents"), Documents::make(&id()).unwrap());
        fs::write(dir.0.join(KEY), made.key.secret_der()).unwrap();
        fs::write(dir.0.join(CSR), &made.csr).unwrap();
        let read = Documents::load(&dir.0, &id()).unwrap();
        assert_eq!((read.key.secret_der(), &read.csr), (made.key.secret_der(), &made.csr));
    }

    #[test]
    fn without_files_documents_are_made_and_nothing_is_written() {
        let dir = Dir::new("no-documents");
        Documents::load(&dir.0, &id()).unwrap();
        Documents::load(&dir.0.join("absent"), &id()).unwrap();
        fs::write(dir.0.join(CSR), b"alone").unwrap();
        Documents::load(&dir.0, &id()).unwrap();
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 1);
    }

    #[test]
    fn unusable_files_are_named() {
        let (dir, made, other) = (Dir::new("bad-documents"), Documents::make(&id()), Documents::make(&id()));
        let (made, other) = (made.unwrap(), other.unwrap());
        fs::write(dir.0.join(CSR), &made.csr).unwrap();
        fs::write(dir.0.join(KEY), b"").unwrap();
        refused(&dir, "key.p8: 0 bytes long");
        fs::write(dir.0.join(KEY), b"junk").unwrap();
        refused(&dir, "unusable private key");
        fs::write(dir.0.join(KEY), other.key.secret_der()).unwrap();
        refused(&dir, "does not belong");
        let db = Documents::make(&"db.example".parse().unwrap()).unwrap();
        fs::write(dir.0.join(KEY), db.key.secret_der()).unwrap();
        fs::write(dir.0.join(CSR), &db.csr).unwrap();
        refused(&dir, "db.example");
    }

    #[test]
    fn tokens_are_read_whole_or_refused_with_a_reason() {
        let dir = Dir::new("token");
        let file = |content: &[u8]| {
            fs::write(dir.0.join("token"), content).unwrap();
            token(&dir.0.join("token")).map_err(|e| e.to_string())
        };
        assert_eq!(file(b" a token\n").unwrap(), b" a token\n");
        assert!(file(b"").unwrap_err().ends_with("token is empty"));
        assert!(file(&[b'x'; 65_537]).unwrap_err().contains("larger than 65536 bytes"));
        let missing = token(&dir.0.join("none")).unwrap_err().to_string();
        assert!(missing.contains("none can't be read: No such file"), "{missing}");
    }
}
