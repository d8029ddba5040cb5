// Values as the libraries of package.json write them: npm install; node npm.mjs
import CryptoJS from "crypto-js";
import Cryptr from "cryptr";
import { encryptStringSync, generateKey } from "@47ng/cloak";
import { symmetricEncrypt } from "better-auth/crypto";
import * as jose from "jose";
import { createCipheriv, randomBytes } from "node:crypto";

const texts = ["s3cret", "", "grüße, 世界", "x".repeat(200)];
const credential = JSON.stringify({ user: "grüße", password: "s3cret", tokens: { refresh: "1//0g" + "x".repeat(600) } });
const made = [];
const put = (format, key, plaintext, value) => made.push({ format, key, plaintext, value });
const cloak = generateKey();
const raw = randomBytes(64);
for (const text of texts) {
  put("openssl", "correct horse", text, CryptoJS.AES.encrypt(text, "correct horse").toString());
  put("cryptr", "cryptr secret", text, new Cryptr("cryptr secret").encrypt(text));
  put("cryptr", "cryptr secret", text, new Cryptr("cryptr secret", { encoding: "base64" }).encrypt(text));
  put("prisma", cloak, text, encryptStringSync(text, cloak));
  put("better_auth", "better auth secret of 32 characters", text,
    await symmetricEncrypt({ key: "better auth secret of 32 characters", data: text }));
  const keys = { keys: new Map([[1, "an older secret of 32 characters!!"], [2, "better auth secret of 32 characters"]]), currentVersion: 2 };
  put("better_auth", "better auth secret of 32 characters", text, await symmetricEncrypt({ key: keys, data: text }));
  for (const [enc, bytes] of [["A256CBC-HS512", 64], ["A128CBC-HS256", 32], ["A256GCM", 32]]) {
    const key = raw.subarray(0, bytes);
    put("jwe", Buffer.from(key).toString("base64url"), text,
      await new jose.CompactEncrypt(new TextEncoder().encode(text)).setProtectedHeader({ alg: "dir", enc }).encrypt(key));
  }
}
// n8n's credentials_entity.data.
put("openssl", "n8n encryption key", credential, CryptoJS.AES.encrypt(credential, "n8n encryption key").toString());
// What follows has no library: cal.com's symmetricEncrypt() and encryptSecret() do this.
const characters = randomBytes(24).toString("base64");
for (const text of [...texts, credential]) {
  const iv = randomBytes(16);
  const cipher = createCipheriv("aes256", Buffer.from(characters, "latin1"), iv);
  put("aes_cbc", characters, text, `${iv.toString("hex")}:${cipher.update(text, "utf8", "hex")}${cipher.final("hex")}`);
  const aad = JSON.stringify({ type: "google_calendar" });
  const nonce = randomBytes(12);
  const gcm = createCipheriv("aes-256-gcm", raw.subarray(0, 32), nonce).setAAD(Buffer.from(aad));
  const ct = Buffer.concat([gcm.update(text, "utf8"), gcm.final()]);
  const [n, c, tag] = [nonce, ct, gcm.getAuthTag()].map((one) => one.toString("base64url"));
  put("calcom", `${raw.subarray(0, 32).toString("base64url")} ${aad}`, text,
    JSON.stringify({ v: 1, alg: "AES-256-GCM", ring: "CREDENTIALS", kid: "K1", nonce: n, ct: c, tag }));
}
console.log(JSON.stringify(made, null, 1));
